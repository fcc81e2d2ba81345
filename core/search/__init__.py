"""Mixed precision: the best format for every layer under a budget.

`spaces` says which formats a layer may have, `groups` which layers share one, `costs` what each costs, `solver` chooses, `state` is the
result as plain data. `driver` runs the course over a model that a backend's `SearchHost` (`host`) calibrates and scores. Nothing here
knows torch or jax.
"""

DEFAULT_FORMATS = ("NVFP4_AWQ_LITE_CFG", "FP8_DEFAULT_CFG")
