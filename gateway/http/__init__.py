"""The gateway's HTTP side: runs, tickets, the page, health and the internal listener."""
