//! What prefill and decode processes share: from settings to a joined node with a running engine.
