def shipped_weights(): raise SystemExit("later")
