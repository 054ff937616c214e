"""Operations: logs, metrics, health, tracing, the watchdog and model control."""
