from diptych.engine.loop.event_loop import EventLoop as EventLoop
