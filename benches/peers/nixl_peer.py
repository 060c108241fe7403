"""NIXL with its UCX backend: writes from memory to memory; UCX_TLS says over what.
nixl_peer.py target HOST BYTES | nixl_peer.py initiator HOST ADDRESS BYTES"""
import base64
import json
import os
import sys

os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
role, host = sys.argv[1:3]
saved = os.dup(1)
os.dup2(2, 1)
from common import buffer, connect, drive, listen, order, recv, send, serve
from nixl._api import nixl_agent, nixl_agent_config

size = int(sys.argv[-1])
# A target without a thread of its own would not take what comes; an initiator polls.
agent = nixl_agent(role, nixl_agent_config(role == "target", False, 0, backends=["UCX"]))
memory = buffer(size, None if role == "target" else 42)
base = memory.ctypes.data
registered = agent.register_memory([(base, size, 0, "")], "DRAM")
os.dup2(saved, 1)
text = lambda data: base64.b64encode(data).decode()
if role == "target":
    s = listen(host)
    print(json.dumps(f"{host}:{s.getsockname()[1]}"), flush=True)
    c, _ = s.accept()
    send(c, {"meta": text(agent.get_agent_metadata()), "base": base})
    agent.add_remote_agent(base64.b64decode(recv(c)["meta"]))

    def arrived(_):
        count = 0
        while count < 1:
            count += sum(len(notes) for notes in agent.get_new_notifs().values())

    serve(c, memory, arrived)
else:
    c = connect(sys.argv[3])
    peer = recv(c)
    name = agent.add_remote_agent(base64.b64decode(peer["meta"]))
    send(c, {"meta": text(agent.get_agent_metadata())})

    def prepare(total, block):
        places, count = order(total // block), total // block
        local = agent.get_xfer_descs([(base + index * block, block, 0) for index in range(count)], "DRAM")
        there = [(peer["base"] + int(places[index]) * block, block, 0) for index in range(count)]
        remote = agent.get_xfer_descs(there, "DRAM")
        handle = agent.initialize_xfer("WRITE", local, remote, name, b"done")

        def transfer():
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            assert state == "DONE", state

        return transfer, lambda: agent.release_xfer_handle(handle)

    drive(c, prepare)
os._exit(0)
