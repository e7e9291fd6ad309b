"""Writes a web server's access log: 100,000 requests of random clients, 22 MB. Input of two traces."""

import random

r = random.Random(1)
CHROME = "(Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0 Safari/537.36"
SAFARI = (
    "(Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17 Safari/605.1.15"
)
AGENTS = ["(X11; Linux x86_64; rv:109.0) Gecko/20100101 Firefox/115.0", CHROME, SAFARI]
for _ in range(100_000):
    client = ".".join(str(r.randrange(256)) for _ in range(4))
    day = f"{r.randrange(1, 29):02}/Mar/2024"
    time = f"{day}:{r.randrange(24):02}:{r.randrange(60):02}:{r.randrange(60):02} +0000"
    request = f'"GET /item/{r.randrange(10**6):06} HTTP/1.1" 200 {r.randrange(10**5)}'
    referrer = f'"https://example.org/list?page={r.randrange(10**4)}"'
    print(f'{client} - - [{time}] {request} {referrer} "Mozilla/5.0 {r.choice(AGENTS)}"')
