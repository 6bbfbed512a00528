"""From lowered TensorIR to SPIR-V, in layers:

    enums → assembler → types → builder → arithmetic → indexing, intrinsics → memory
          → expressions → statements → shader

Each file imports only what stands before it. Only the last three know TVM's nodes by more than their names.
"""
