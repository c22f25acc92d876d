"""Images from outside: files of strangers, data URIs, and downloads that cannot reach the server's own network."""

import asyncio
import base64
import io
import ipaddress
import math
import socket

import httpx
import PIL.Image


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # PIL knows more, some of which run other programs
MAX_IMAGE_PIXELS = 2**25  # of all images in a request
MAX_REDIRECTS = 3
DOWNLOAD_SECONDS = 20.0


def check_images(files: list[bytes], max_pixels: int = MAX_IMAGE_PIXELS) -> None:
    """Check formats and sizes, or raise a `ValueError`, without reading pixels: a small file may hold billions."""
    num_pixels = 0
    for data in files:
        try:
            image = PIL.Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            num_pixels += image.width * image.height
        except PIL.Image.DecompressionBombError:
            num_pixels = math.inf
        except Exception as error:  # decoders raise anything for broken headers
            known = ", ".join(IMAGE_FORMATS)
            raise ValueError(f"An image cannot be read: it is broken, or its format is none of {known}.") from error
    if num_pixels > max_pixels:
        raise ValueError(f"The request's images have more than the {max_pixels} pixels that this server takes.")


def decode_data_uri(uri: str) -> bytes:
    """Return the bytes of a base64 data URI, or raise a `ValueError`."""
    header, comma, data = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ValueError("The data URI has no base64 data: it must look like data:image/png;base64,iVBORw0KGgo=.")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise ValueError(f"The data URI is not valid base64: {error}.") from error


def is_public(address: str) -> bool:
    """Return whether an IP address is on the public internet, also if it is an IPv4 address within IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and (ip.sixtofour or ip.teredo or ip not in ipaddress.ip_network("2000::/3")):
        return False  # all public addresses of IPv6 are in 2000::/3
    return ip.is_global and not ip.is_multicast


async def find_public_address(host: str, port: int) -> str:
    """Resolve a host, and raise a `ValueError` if one of its addresses is private, loopback or link-local."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"The image's host {host} is not known.") from error
    addresses = [str(info[4][0]) for info in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise ValueError(f"The image's host {host} is not on the public internet, so the server does not contact it.")
    return addresses[0]


async def download(url: str, max_bytes: int) -> bytes:
    """
    Download an image from the public internet.

    Each redirect is checked like the first address. The connection goes to the address that was checked, so that a
    name that resolves differently the next time makes no difference.

    Raises:
        ValueError: If the address is not a public one, or the answer is no success, too large or too slow.
    """
    try:
        return await asyncio.wait_for(follow(url, max_bytes), DOWNLOAD_SECONDS)
    except asyncio.TimeoutError as error:
        raise ValueError(f"The image was not downloaded within {DOWNLOAD_SECONDS:g} seconds.") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"The image cannot be downloaded ({type(error).__name__}).") from error


async def follow(url: str, max_bytes: int) -> bytes:
    async with httpx.AsyncClient(trust_env=False, timeout=None) as client:
        for _ in range(MAX_REDIRECTS + 1):
            target = httpx.URL(url)
            if target.scheme not in ("http", "https") or not target.host or target.userinfo:
                raise ValueError("The image's address must begin with http:// or https://, without a user name.")
            port = target.port or {"http": 80, "https": 443}[target.scheme]
            if not 0 < port < 65536:
                raise ValueError(f"The image's address has the port {port}, but ports are 1 to 65535.")
            address = await find_public_address(target.host, port)
            request = client.build_request(
                "GET",
                target.copy_with(host=address),
                headers={"Host": target.netloc.decode(), "Accept": "image/*", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": target.host},  # certificates are checked against the name
            )
            response = await client.send(request, stream=True)
            if response.has_redirect_location:
                await response.aclose()
                url = str(target.join(response.headers["location"]))
                continue
            if response.status_code != 200:
                raise ValueError(f"The image's host answers with status {response.status_code}.")
            data = bytearray()
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > max_bytes:
                    raise ValueError(f"The image is larger than the {max_bytes} bytes that this server takes.")
            return bytes(data)
    raise ValueError(f"The image's address redirects more than {MAX_REDIRECTS} times.")
