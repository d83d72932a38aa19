//! Host name, machine id and name servers.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use offshoot_protocol::Id;
use offshoot_protocol::agent::ErrorCode;

use super::Outcome;
use crate::failure::{Doing, refusal};

/// Replaces a small file of `/etc`. One that is mounted over, as in containers, can only be
/// written in place.
fn write(path: &str, text: &str) -> io::Result<()> {
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let mut new = target.clone().into_os_string();
    new.push(".offshoot");
    let new = Path::new(&new);
    let replaced = fs::write(new, text)
        .and_then(|()| fs::set_permissions(new, fs::Permissions::from_mode(0o644)))
        .and_then(|()| fs::rename(new, &target));
    replaced.or_else(|_| {
        let _ = fs::remove_file(new);
        fs::write(&target, text)
    })
}

/// Sets the host name, now and for the next boot.
pub(super) fn set_hostname(name: &[u8]) -> Outcome {
    let text = std::str::from_utf8(name).ok().filter(|name| {
        let good = |letter: char| letter.is_ascii_alphanumeric() || "-._".contains(letter);
        (1..=64).contains(&name.len()) && name.chars().all(good)
    });
    let text = text.ok_or_else(|| refusal(ErrorCode::Invalid, "the host name"))?;
    rustix::system::sethostname(name).doing("setting the host name")?;
    write("/etc/hostname", &format!("{text}\n")).doing("writing /etc/hostname")?;
    Ok(true)
}

/// Sets the machine id (machine-id(5)).
pub(super) fn set_machine_id(id: Id) -> Outcome {
    write("/etc/machine-id", &format!("{id}\n")).doing("writing /etc/machine-id")?;
    // D-Bus keeps one of its own where it is not a link to the other.
    let of_dbus = Path::new("/var/lib/dbus/machine-id");
    if fs::symlink_metadata(of_dbus).is_ok_and(|about| about.is_file()) {
        fs::write(of_dbus, format!("{id}\n")).doing("writing D-Bus' machine id")?;
    }
    Ok(true)
}

/// Sets the name servers.
pub(super) fn set_resolvers(servers: &[IpAddr]) -> Outcome {
    let lines: String = servers
        .iter()
        .map(|ip| format!("nameserver {ip}\n"))
        .collect();
    write("/etc/resolv.conf", &lines).doing("writing /etc/resolv.conf")?;
    Ok(true)
}
