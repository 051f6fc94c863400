"""The bottleneck: information, gates, anchors, attention network, and the module that joins them."""
