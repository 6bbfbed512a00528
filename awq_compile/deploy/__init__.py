"""Models into apps and onto phones: MLC's package configuration, and transfer to Android by adb."""
