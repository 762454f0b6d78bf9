"""Choose and launch a kernel at run time: dispatch, launch, tuning."""
