"""How a conversation becomes a prompt, and mlc-chat-config.json, which tells the MLC runtime."""
