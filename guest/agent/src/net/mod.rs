//! Network interfaces, addresses and routes, by rtnetlink.
//!
//! By hand because what is needed is five messages: the crates that speak netlink bring either an
//! asynchronous runtime or more code than the whole agent.

mod message;

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use offshoot_protocol::Mac;
use offshoot_protocol::agent::{Address, ErrorCode, Link, Refusal, Route};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

use crate::failure::{Doing, refusal};
use message::{Message, attributes, family, messages, u32_at};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;

const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
const REPLACE: u16 = 0x100;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;

const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 8;
/// The address is the host's to give: nobody on the link is asked whether he has it.
const IFA_F_NODAD: u8 = 2;

/// Bytes of `struct ifinfomsg` and `struct ifaddrmsg`.
const LINK_FIXED: usize = 16;
const ADDRESS_FIXED: usize = 8;

/// Applies what a link is to be.
pub(crate) fn configure(link: &Link) -> Result<(), Refusal> {
    check(link)?;
    let mut netlink = Netlink::open().doing("opening a netlink socket")?;
    let (index, flags) = netlink.find(&link.name)?;
    if let Some(mac) = link.mac {
        netlink
            .set_mac(index, flags, mac)
            .doing("setting the Ethernet address")?;
    }
    if let Some(mtu) = link.mtu {
        let mtu = (IFLA_MTU, mtu.to_ne_bytes());
        netlink
            .set_link(index, 0, 0, Some((mtu.0, &mtu.1)))
            .doing("setting the MTU")?;
    }
    netlink
        .set_link(index, IFF_UP, IFF_UP, None)
        .doing("bringing the interface up")?;
    if link.replace {
        netlink
            .remove_addresses(index)
            .doing("removing the old addresses")?;
    }
    for address in &link.addresses {
        netlink
            .add_address(index, *address)
            .doing(&format!("adding {}", address.ip))?;
    }
    for route in &link.routes {
        netlink
            .add_route(index, route)
            .doing(&format!("adding a route to {}", route.to.ip))?;
    }
    Ok(())
}

/// Brings the loopback interface up, as an init does.
pub(crate) fn loopback_up() -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    for link in netlink.links()? {
        if link.flags & IFF_LOOPBACK != 0 {
            netlink.set_link(link.index, IFF_UP, IFF_UP, None)?;
        }
    }
    Ok(())
}

/// What the kernel would take in another sense than it was meant.
fn check(link: &Link) -> Result<(), Refusal> {
    let fits = |address: &Address| match address.ip {
        IpAddr::V4(_) => address.prefix <= 32,
        IpAddr::V6(_) => address.prefix <= 128,
    };
    let same = |route: &Route| {
        route
            .gateway
            .is_none_or(|gateway| gateway.is_ipv4() == route.to.ip.is_ipv4())
    };
    let good = link.addresses.iter().all(fits)
        && link
            .routes
            .iter()
            .all(|route| fits(&route.to) && same(route));
    match good {
        true => Ok(()),
        false => Err(refusal(
            ErrorCode::Invalid,
            "an address or route of the interface",
        )),
    }
}

#[derive(Debug)]
struct Interface {
    index: u32,
    flags: u32,
    name: Vec<u8>,
}

#[derive(Debug)]
struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    fn open() -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(5)))?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; 32 << 10],
        })
    }

    /// Sends a request and collects the bodies of type `wanted` until its end.
    fn ask(&mut self, message: Message, wanted: u16) -> io::Result<Vec<Vec<u8>>> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.finish(self.sequence);
        send(&self.socket, &bytes, SendFlags::empty())?;
        let mut found = Vec::new();
        loop {
            let (got, _) = recv(&self.socket, &mut *self.buffer, RecvFlags::empty())?;
            for (kind, sequence, body) in messages(self.buffer.get(..got).unwrap_or_default()) {
                match kind {
                    _ if sequence != self.sequence => {}
                    NLMSG_DONE => return Ok(found),
                    // The error is negative, and 0 acknowledges.
                    NLMSG_ERROR => match u32_at(body, 0).wrapping_neg() {
                        0 => return Ok(found),
                        error => {
                            let error = i32::try_from(error).unwrap_or(libc::EIO);
                            return Err(io::Error::from_raw_os_error(error));
                        }
                    },
                    kind if kind == wanted => found.push(body.to_vec()),
                    _ => {}
                }
            }
        }
    }

    fn tell(&mut self, message: Message) -> io::Result<()> {
        self.ask(message, NLMSG_DONE).map(drop)
    }

    fn links(&mut self) -> io::Result<Vec<Interface>> {
        let dump = Message::new(RTM_GETLINK, REQUEST | DUMP, &[0; LINK_FIXED]);
        let bodies = self.ask(dump, RTM_NEWLINK)?;
        let interface = |body: &Vec<u8>| {
            let attributes = attributes(body, LINK_FIXED);
            let name = attributes.iter().find(|(kind, _)| *kind == IFLA_IFNAME);
            let name = name.map(|(_, name)| *name).unwrap_or_default();
            Interface {
                index: u32_at(body, 4),
                flags: u32_at(body, 8),
                name: name.strip_suffix(&[0]).unwrap_or(name).to_vec(),
            }
        };
        Ok(bodies.iter().map(interface).collect())
    }

    /// Index and flags of the interface of a name; the first that is no loopback for none.
    fn find(&mut self, name: &[u8]) -> Result<(u32, u32), Refusal> {
        let links = self.links().doing("listing the interfaces")?;
        let mut links = links.iter();
        let link = match name.is_empty() {
            true => links.find(|link| link.flags & IFF_LOOPBACK == 0),
            false => links.find(|link| link.name == name),
        };
        match link {
            Some(link) => Ok((link.index, link.flags)),
            None => Err(io::Error::from_raw_os_error(libc::ENODEV)).doing("finding the interface"),
        }
    }

    fn set_link(
        &mut self,
        index: u32,
        flags: u32,
        change: u32,
        attribute: Option<(u16, &[u8])>,
    ) -> io::Result<()> {
        let fixed = [0, index, flags, change].map(u32::to_ne_bytes).concat();
        let message = Message::new(RTM_NEWLINK, REQUEST | ACK, &fixed);
        self.tell(match attribute {
            Some((kind, value)) => message.with(kind, value),
            None => message,
        })
    }

    fn set_mac(&mut self, index: u32, flags: u32, mac: Mac) -> io::Result<()> {
        match self.set_link(index, 0, 0, Some((IFLA_ADDRESS, &mac.0))) {
            // A driver that changes the address only while the interface is down.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                self.set_link(index, 0, IFF_UP, None)?;
                let result = self.set_link(index, 0, 0, Some((IFLA_ADDRESS, &mac.0)));
                self.set_link(index, flags & IFF_UP, IFF_UP, None)?;
                result
            }
            result => result,
        }
    }

    fn remove_addresses(&mut self, index: u32) -> io::Result<()> {
        let dump = Message::new(RTM_GETADDR, REQUEST | DUMP, &[0; ADDRESS_FIXED]);
        let bodies = self.ask(dump, RTM_NEWADDR)?;
        let mut seen = HashSet::new();
        for body in bodies.iter().filter(|body| u32_at(body, 4) == index) {
            let attributes = attributes(body, ADDRESS_FIXED);
            let mut message = Message::new(
                RTM_DELADDR,
                REQUEST | ACK,
                body.get(..ADDRESS_FIXED).unwrap_or_default(),
            );
            // Link-local IPv6 addresses follow from the Ethernet address and go with it.
            for (kind, value) in attributes.iter().filter(|(kind, _)| (1..=2).contains(kind)) {
                message = message.with(*kind, value);
            }
            // Some kernels list an address twice while it changes.
            if !seen.insert(body.clone()) {
                continue;
            }
            match self.tell(message) {
                // Secondary addresses go with the first one of their network.
                Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
                result => result?,
            }
        }
        Ok(())
    }

    fn add_address(&mut self, index: u32, address: Address) -> io::Result<()> {
        let (family, bytes) = family(address.ip);
        let mut fixed = vec![family, address.prefix, IFA_F_NODAD, 0];
        fixed.extend(index.to_ne_bytes());
        let message = Message::new(RTM_NEWADDR, REQUEST | ACK | CREATE | EXCLUSIVE, &fixed)
            .with(IFA_LOCAL, &bytes)
            .with(IFA_ADDRESS, &bytes);
        match self.tell(message) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            result => result,
        }
    }

    fn add_route(&mut self, index: u32, route: &Route) -> io::Result<()> {
        const MAIN_TABLE: u8 = 254;
        const BY_ADMINISTRATOR: u8 = 4;
        const EVERYWHERE: u8 = 0;
        const ON_LINK: u8 = 253;
        const UNICAST: u8 = 1;
        let (family, bytes) = family(route.to.ip);
        let scope = if route.gateway.is_some() {
            EVERYWHERE
        } else {
            ON_LINK
        };
        let to = route.to.prefix;
        let fixed = [
            family,
            to,
            0,
            0,
            MAIN_TABLE,
            BY_ADMINISTRATOR,
            scope,
            UNICAST,
            0,
            0,
            0,
            0,
        ];
        let mut message = Message::new(RTM_NEWROUTE, REQUEST | ACK | CREATE | REPLACE, &fixed)
            .with(RTA_OIF, &index.to_ne_bytes());
        if to > 0 {
            message = message.with(RTA_DST, &bytes);
        }
        if let Some(gateway) = route.gateway {
            message = message.with(RTA_GATEWAY, &message::family(gateway).1);
        }
        if let Some(metric) = route.metric {
            message = message.with(RTA_PRIORITY, &metric.to_ne_bytes());
        }
        self.tell(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_lists_the_loopback_interface() {
        let mut netlink = Netlink::open().unwrap();
        let links = netlink.links().unwrap();
        let loopback = links
            .iter()
            .find(|link| link.flags & IFF_LOOPBACK != 0)
            .unwrap();
        assert_eq!(
            (loopback.index, loopback.name.as_slice()),
            (1, b"lo".as_slice())
        );
        assert_eq!(netlink.find(b"lo").unwrap().0, 1);
        let refusal = netlink.find(b"no-such-link").unwrap_err();
        assert_eq!((refusal.code, refusal.errno), (ErrorCode::Os, libc::ENODEV));
    }

    #[test]
    fn mixed_families_are_refused_before_anything_is_done() {
        let to = Address {
            ip: [10, 0, 0, 0].into(),
            prefix: 33,
        };
        let mut link = Link {
            name: b"lo".to_vec(),
            mac: None,
            mtu: None,
            replace: false,
            addresses: vec![to],
            routes: Vec::new(),
        };
        assert_eq!(configure(&link).unwrap_err().code, ErrorCode::Invalid);
        link.addresses.clear();
        let gateway = Some(IpAddr::from([0u16; 8]));
        let to = Address { prefix: 8, ..to };
        link.routes.push(Route {
            to,
            gateway,
            metric: None,
        });
        assert_eq!(configure(&link).unwrap_err().code, ErrorCode::Invalid);
    }
}
