"""Programs that run the experiments, and the models and data that they need; the only place where both frameworks are seen."""
