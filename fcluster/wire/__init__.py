"""Between processes: messages, sockets, keys, HTTP ports, and how the leader is found."""
