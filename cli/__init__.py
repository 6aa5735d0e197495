"""The command line `easel`: a client of a server that runs here or elsewhere. It needs click, httpx, httpx-sse and rich, and
nothing of the server's packages.

`main` has the commands, `server` the calls, `showing` what is printed, `saving` files, `bench` the measuring.
"""
