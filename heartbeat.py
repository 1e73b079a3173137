"""A process that is killed or stopped ends the run of several within a minute, by name.

Every process is connected to the first, and a thread of each sends a byte a second, whatever the process is at: an
evaluation that the others wait for may take as long as it likes. A connection that closes without a word is a process
that was killed; one that is silent for long a process that was stopped, or that the network has lost.
"""
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress

from errors import InputError, say

BEAT, LEAVES, FAILED = b'.', b'l', b'f'    # I am here; I am done; the run has failed and the user is told
LIMIT = 25           # beats that may be missing; torchrun takes 30 seconds more to end a stopped process
TIME_TO_MEET = 60    # seconds


class Heartbeat(threading.Thread):

    def __init__(self, rank, world, peers):
        """peers {socket: rank}: of the first process all others, of the others the first."""
        super().__init__(daemon=True)
        self.rank, self.world, self.peers, self.done = rank, world, list(peers), False
        self.silent = dict.fromkeys(peers.values(), 0)    # {rank: beats that are missing}
        self.selector = selectors.DefaultSelector()
        for peer, other in peers.items():
            peer.setblocking(False)
            self.selector.register(peer, selectors.EVENT_READ, other)

    def tell(self, word):
        """Send a byte to all; one that is gone is noticed where it is listened to."""
        for peer in self.peers:
            with suppress(OSError):
                peer.send(word)

    def run(self):
        due = time.monotonic()
        while not self.done and self.silent:
            for key, _ in self.selector.select(max(0, due - time.monotonic())):
                self.listen(key.fileobj, key.data)
            if time.monotonic() >= due:
                due = time.monotonic() + 1    # one beat at most after a pause of this process itself
                self.tell(BEAT)
                for other in self.silent:
                    self.silent[other] += 1
                    if self.silent[other] > LIMIT:
                        self.end(other, f'has been silent for {LIMIT} s: stopped, or cut off')

    def listen(self, peer, other):
        try:
            heard = peer.recv(4096)
        except OSError:
            heard = b''
        if self.done:
            return
        if FAILED in heard:
            if self.rank == 0:
                self.tell(FAILED)
            os._exit(2)
        if LEAVES in heard:
            self.selector.unregister(peer)
            del self.silent[other]
        elif heard:
            self.silent[other] = 0
        else:
            self.end(other, 'is gone: killed, or out of memory')

    def end(self, other, what):
        """Say what happened to another process, once: the first does, or the second where it is the first. And end at
        once, for the main thread may wait for that process."""
        if self.rank <= 1:
            with suppress(OSError):    # nobody may be there to read it
                print(f'error: process {other + 1} of {self.world} (rank {other}) {what}; the run ends, what it has '
                      f'saved stays', file=sys.stderr)
        self.tell(FAILED)
        os._exit(2)

    def leave(self):
        """This process has done its work."""
        self.done = True
        self.tell(LEAVES)

    def fail(self, error):
        """This process ends with an error, and so do the others.

        Unless it hears of theirs first, and ends here without a word: the first may have the same error, and a
        collective fails where another process is gone.
        """
        if self.rank and isinstance(error, InputError) or isinstance(error, RuntimeError):
            time.sleep(5)
        self.done = True
        if isinstance(error, InputError):
            say(error)
        self.tell(FAILED)


def connected(rank, world, of_first):
    """The Heartbeat of this process. of_first(function): what function returns in the first process, in all of them."""
    server = None if rank else listening()
    addresses, port, token = of_first(lambda: (addresses_here(), server.getsockname()[1], secrets.token_bytes(16)))
    peers = accepted(server, world, token) if server else {reached(addresses, port, token, rank): 0}
    heartbeat = Heartbeat(rank, world, peers)
    heartbeat.start()
    return heartbeat


def listening():
    if socket.has_dualstack_ipv6():
        return socket.create_server(('', 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(('', 0), backlog=1024)


def addresses_here():
    """Under which others may reach this machine: what they were told, and what it calls itself."""
    try:
        return [os.environ['MASTER_ADDR'], socket.gethostbyname(socket.gethostname())]
    except OSError:
        return [os.environ['MASTER_ADDR']]


def accepted(server, world, token):
    """{socket: rank} of every other process, each of which knows the token."""
    peers, end = {}, time.monotonic() + TIME_TO_MEET
    with server:
        while len(peers) < world - 1:
            try:
                server.settimeout(max(0.01, end - time.monotonic()))
                peer, _ = server.accept()
            except TimeoutError:
                missing = min(set(range(1, world)) - set(peers.values()))
                raise InputError(f'process {missing + 1} of {world} did not connect to the first within '
                                 f'{TIME_TO_MEET} s; wanted a network that lets it') from None
            peer.settimeout(5)
            hello = b''
            with suppress(OSError), peer.makefile('rb') as f:
                hello = f.read(20)
            if hello[:16] == token:
                peers[peer] = int.from_bytes(hello[16:], 'big')
            else:
                peer.close()
    return peers


def reached(addresses, port, token, rank):
    """A socket to the first process."""
    for address in addresses:
        try:
            peer = socket.create_connection((address, port), timeout=10)
            peer.sendall(token + rank.to_bytes(4, 'big'))
            return peer
        except OSError:
            continue
    raise InputError(f'the first process cannot be reached at port {port} of {" or ".join(addresses)}; wanted a '
                     f'network that lets it')
