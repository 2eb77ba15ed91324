def export(*a): raise SystemExit("later")
