"""Communication between processes: messages, sockets, keys, HTTP ports, and finding the leader."""
