"""Kernels in CUDA C++, compiled where they run by NVRTC, which comes with PyTorch for CUDA."""
