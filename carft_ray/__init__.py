"""carft-ray: Ray-distributed hyperparameter search for CAR-FT (context-aware robust fine-tuning of CLIP)."""

__version__ = "0.1.0"
