"""QUIC for the data path: engine, endpoint, connections, and how packets find their worker.

The *engine* (`engine.py`) is one connection's transport: a library's, behind the one module that knows it.
A *connection* (`connection.py`) gives it datagrams, time and a way out; the *endpoint* (`endpoint.py`) is a
listening socket with its connections, and decides who becomes one. What is spoken on the streams is the
*session*'s business: HTTP/3 (`net/h3_front.py`, `net/h3_back.py`) or the raw relay.

Every worker has a member of a listener's SO_REUSEPORT group, and the kernel spreads datagrams by their
addresses, which change while a connection lives (NAT rebinding, migration: RFC 9000 9). Three layers put that
right, each for what the one before could not know:

- `steering`: a program in the kernel reads the worker out of the connection IDs that we make (`cids`);
- `spares`: a table in shared memory says whose those are that the QUIC library makes, which carry nothing;
- `handover`: a worker that receives another's datagrams passes them on (`sharing` brings all this together).
"""
