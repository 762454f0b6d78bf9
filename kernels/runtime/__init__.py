"""How a kernel is chosen and started at run time: dispatch, launch, tuning."""
