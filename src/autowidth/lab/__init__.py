"""The laboratory: networks, data, training, measurement, published methods. The core never imports it."""
