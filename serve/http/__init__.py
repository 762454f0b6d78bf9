"""The HTTP server: routes, OpenAI requests and answers, authentication, admission, the page."""
