"""Units in other processes and on other machines, and units whose devices are several machines'.

- A unit in another process: `RemoteUnit` here, `UnitHost` there, `messages` between them. Ray
  (`ray_fleet`, `ray_peer`) starts the processes and carries the messages.
- A unit over several machines: each runs the same programs (`hosts`, `leader`, `follower`), in the
  order that the first of them says.
"""
