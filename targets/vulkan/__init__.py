"""Vulkan: a SPIR-V generator for TVM builds that bring none, and the packing of its shaders."""
