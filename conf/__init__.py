"""Hydra configuration: one primary file a job, one folder a group."""
