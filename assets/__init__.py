"""Packaged data: catalogue, zoo, example pipelines, workload texts, pictures."""
