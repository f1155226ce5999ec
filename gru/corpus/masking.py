"""Masks personal data: replaces e-mail addresses and public IP addresses by placeholders.

The placeholders are reserved for documentation (RFC 2606, 5737 and 3849), so that a masked text stays as it is.
"""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address

EMAIL, IPV4, IPV6 = "email@example.com", "192.0.2.1", "2001:db8::1"

# Letters of Latin script only: Chinese is written without a space before and behind an address. The lengths are those
# of RFC 5321 and 1035; they also bound the time that a long run of letters takes.
_LETTER = r"A-Za-z\u00c0-\u024f"
_EMAIL = re.compile(
    rf"(?<![{_LETTER}0-9_])[{_LETTER}0-9_][{_LETTER}0-9_.%+'-]{{0,63}}"
    rf"@(?:[{_LETTER}0-9-]{{1,63}}\.)+[{_LETTER}]{{2,63}}"
)
# Five numbers with dots, or four behind a letter as in v1.2.3.4, are something else. Of IPv6 only 2000::/3 is assigned
# to hosts, so `dead::beef` in source code is no address. Quantifiers are possessive: all of an address or none.
_IP = re.compile(
    r"(?<![\w.])(?:\d{1,3}(?:\.\d{1,3}){3}+"
    r"|(?<![0-9A-Fa-f:]:)[23][0-9A-Fa-f]{3}(?=:)(?:::?[0-9A-Fa-f]{1,4})*+(?:::)?+)(?!\w|\.\d)",
    re.ASCII,
)


def mask_emails(text: str) -> str:
    """Return the text with EMAIL in place of each e-mail address."""
    return _EMAIL.sub(EMAIL, text) if "@" in text else text


def mask_ips(text: str) -> str:
    """Return the text with IPV4 or IPV6 in place of each IP address of the public Internet."""
    return _IP.sub(_mask_ip, text)


def _mask_ip(match: re.Match[str]) -> str:
    try:
        address: IPv4Address | IPv6Address = ip_address(match[0])
    except ValueError:
        return match[0]
    placeholder = IPV4 if address.version == 4 else IPV6
    return placeholder if address.is_global else match[0]
