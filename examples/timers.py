"""The four kinds of timers: callback, loop, defer, cycle. Ends by itself after about half a second.

Try it:  python examples/timers.py
"""

from pants_green import Engine

engine = Engine.instance()
beats = 0
turns = 0


def beat():
    global beats
    beats += 1
    print(f"beat {beats}", flush=True)
    if beats == 3:
        print("the cycle cancels itself", flush=True)
        every_tenth.cancel()


def turn():
    global turns
    turns += 1


def finish(word):
    every_turn.cancel()
    print(f"{word}: {beats} beats, {'some' if turns else 'no'} turns of the loop", flush=True)
    engine.stop()


engine.callback(print, "in the next turn of the loop", flush=True)
every_turn = engine.loop(turn)
every_tenth = engine.cycle(0.1, beat)
engine.defer(0.5, finish, "the end")
engine.start()
