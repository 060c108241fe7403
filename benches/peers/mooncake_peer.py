"""Mooncake's transfer engine: writes from memory to memory over TCP.
mooncake_peer.py target HOST BYTES | mooncake_peer.py initiator HOST ADDRESS BYTES"""
import json
import os
import sys

os.environ.setdefault("GLOG_minloglevel", "3")
# The default of 1024 refuses batches of more blocks.
os.environ.setdefault("MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER", "65535")
os.environ.setdefault("MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER", "65535")
role, host = sys.argv[1:3]
os.environ.setdefault("MC_TCP_BIND_ADDRESS", host)
saved = os.dup(1)
os.dup2(2, 1)  # its log goes to standard output otherwise
from common import buffer, connect, drive, listen, order, recv, send, serve
from mooncake.engine import TransferEngine

size = int(sys.argv[-1])
engine = TransferEngine()
assert engine.initialize(host, "P2PHANDSHAKE", "tcp", "") == 0
memory = buffer(size, None if role == "target" else 42)
base = memory.ctypes.data
assert engine.register_memory(base, size) == 0
os.dup2(saved, 1)
if role == "target":
    s = listen(host)
    print(json.dumps(f"{host}:{s.getsockname()[1]}"), flush=True)
    c, _ = s.accept()
    send(c, {"name": f"{host}:{engine.get_rpc_port()}", "base": base})
    serve(c, memory)
else:
    c = connect(sys.argv[3])
    peer = recv(c)

    def prepare(total, block):
        places, count = order(total // block), total // block
        local = [base + index * block for index in range(count)]
        remote = [peer["base"] + int(places[index]) * block for index in range(count)]
        lengths = [block] * count

        def transfer():
            assert engine.batch_transfer_sync_write(peer["name"], local, remote, lengths) == 0

        return transfer, lambda: None

    drive(c, prepare)
os._exit(0)
