"""The fused operators on a CPU, by the engine of csrc/cpu/."""
