"""A decoder child that closes its output and goes on living."""

import os
import time

os.close(1)
time.sleep(60)
