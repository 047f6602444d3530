"""A service under disturbance, and under steady load for hours, with every answer compared."""
