"""What the kernel lets others see of it: metrics, logs, traces, the event loop's lag."""
