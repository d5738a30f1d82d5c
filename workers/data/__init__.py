"""Known data: what workloads ask about and recipes train on."""
