"""verify: is an exported model the one that was simulated? Real clients load it and are compared with the quantizers that made it.

`job` holds what is compared, `report` what was found; one module per client; `faults` and `controls` show that the clients can fail.
"""

from core.verify.controls import Controls, controls
from core.verify.driver import CLIENTS, verify
from core.verify.job import Job, Run, Simulation, batches_of
from core.verify.report import Check, NotRun, Outcome, Report

__all__ = ["CLIENTS", "Check", "Controls", "Job", "NotRun", "Outcome", "Report", "Run", "Simulation", "batches_of", "controls", "verify"]
