"""TensorIR templates. They take a problem and a schedule, and know no target."""
