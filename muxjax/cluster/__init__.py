"""Units in other processes, and units over the devices of several machines.

- A unit in another process: `RemoteUnit` in this process, `UnitHost` in the other, and `messages`
  between them. Ray (`ray_fleet`, `ray_peer`) starts the processes and transports the messages.
- A unit over several machines: all of them run the same programs in the order that the first one
  decides (`hosts`, `leader`, `follower`).
"""
