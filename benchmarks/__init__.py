"""What the project claims in numbers, measured: speed, memory, scaling, import time, and the probes."""
