"""Storage drivers that come with xbd.  Core never imports them: it finds them by entry point."""
