"""What the documents claim, executed: every snippet of the README and of the guide, every link, every path."""
