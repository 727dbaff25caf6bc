"""A web page that draws a picture with the full cache and with a smaller one. `page` needs gradio, `side_by_side` does not."""
