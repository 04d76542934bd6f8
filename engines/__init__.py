"""Every module here is an engine, registered by ``conf/engine/<name>.yaml`` and nothing else; ``native`` is their shelf."""
