"""Keys and values that exceed the device, kept in host memory meanwhile."""
