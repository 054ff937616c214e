"""Operations: metrics, health, the watchdog and model control."""
