"""Units in other processes, and units over the devices of several machines.

- A unit in another process: `RemoteUnit` in this process, `UnitHost` in the other, and `messages`
  between them. Ray (`ray_fleet`, `ray_peer`) starts the processes and transports the messages.
- A unit over several machines: all machines run the same programs, in the order of the first, the
  leader (`hosts`, `leader`, `follower`).
"""
