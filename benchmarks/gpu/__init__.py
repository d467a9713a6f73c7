"""What `benchmarks/gpu_check.sh` runs on a GPU: a stage is a module, its result is a JSON file."""
