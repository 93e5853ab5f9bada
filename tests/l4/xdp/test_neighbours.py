"""Next hops: those that are asked for, and those that are an operator's."""

from ipaddress import ip_address

from expressgateway.l4.xdp.neighbours import Neighbours
from tests.e2e.xdp_world import need_xdp
from tests.namespaces import Namespace

pytestmark = need_xdp()


def test_what_is_not_known_is_asked_for_and_what_is_static_stays() -> None:
    addresses = [ip_address(each) for each in ("10.9.0.2", "10.9.0.3", "fd09::2", "10.10.0.1")]
    with Namespace("neighbours") as namespace:
        namespace.ip(
            "link add x0 type veth peer name x1",
            "link set x0 up",
            "link set x1 up",
            "addr add 10.9.0.1/24 dev x0",
            "addr add fd09::1/64 dev x0 nodad",
            *(
                f"neigh add {each} lladdr 02:00:00:00:00:01 dev x0 nud permanent"
                for each in ("10.9.0.2", "fd09::2")
            ),
        )
        with namespace.entered():
            neighbours = Neighbours()
        try:
            for _ in range(2):
                assert neighbours.keep(addresses) == 3
        finally:
            neighbours.close()
        known = namespace.show("neigh")
    for address in ("10.9.0.2", "fd09::2"):
        assert f"{address} dev x0 lladdr 02:00:00:00:00:01 PERMANENT" in known
    assert "10.9.0.3 dev x0 " in known
