//! Users by name or number, from `/etc/passwd` and `/etc/group` themselves: a static program has
//! no way to ask the guest's C library.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use offshoot_protocol::agent::{ErrorCode, Refusal, User};
use rustix::process::{Gid, Uid};

use crate::failure::{Doing, refusal};
use crate::sys::Rights;

/// The most of either file that is looked at, in bytes.
const MOST: usize = 4 << 20;

/// A user of the guest.
#[derive(Debug)]
pub(crate) struct Account {
    pub(crate) name: OsString,
    pub(crate) home: OsString,
    pub(crate) rights: Rights,
}

fn number(field: &[u8]) -> Option<u32> {
    let number = std::str::from_utf8(field).ok()?.parse().ok()?;
    // All ones means "leave as it is" to the calls that change an id.
    (number != u32::MAX).then_some(number)
}

fn gid(number: u32) -> Option<Gid> {
    (number != u32::MAX).then(|| Gid::from_raw(number))
}

fn uid(number: u32) -> Option<Uid> {
    (number != u32::MAX).then(|| Uid::from_raw(number))
}

/// A line of `/etc/passwd`.
struct Line<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

fn passwd(text: &[u8]) -> impl Iterator<Item = Line<'_>> {
    text.split(|byte| *byte == b'\n').filter_map(|line| {
        let fields: Vec<_> = line.split(|byte| *byte == b':').collect();
        let [name, _, uid, gid, _, home, ..] = fields.as_slice() else {
            return None;
        };
        Some(Line {
            name,
            uid: number(uid)?,
            gid: number(gid)?,
            home,
        })
    })
}

/// The groups whose lists of members in `text` (`/etc/group`) have the name.
fn groups(text: &[u8], name: &[u8]) -> Vec<u32> {
    let lines = text.split(|byte| *byte == b'\n');
    lines
        .filter_map(|line| {
            let fields: Vec<_> = line.split(|byte| *byte == b':').collect();
            let [_, _, gid, members] = fields.as_slice() else {
                return None;
            };
            let mut members = members.split(|byte| *byte == b',');
            members.any(|member| member == name).then(|| number(gid))?
        })
        .collect()
}

fn file(path: &str) -> Vec<u8> {
    let mut text = fs::read(path).unwrap_or_default();
    text.truncate(MOST);
    text
}

impl Account {
    /// Looks a user up. Numbers need not be in the files.
    pub(crate) fn find(user: &User) -> Result<Self, Refusal> {
        let passwd_text = file("/etc/passwd");
        match user {
            User::Name(name) => {
                let missing = || {
                    let name = String::from_utf8_lossy(name);
                    refusal(ErrorCode::NoUser, &format!("user {name}"))
                };
                let line = passwd(&passwd_text).find(|line| line.name == name.as_slice());
                let line = line.ok_or_else(missing)?;
                let mut all = groups(&file("/etc/group"), name);
                all.push(line.gid);
                all.sort_unstable();
                all.dedup();
                Ok(Self {
                    name: OsString::from_vec(name.clone()),
                    home: home(line.home),
                    rights: Rights {
                        uid: uid(line.uid).ok_or_else(missing)?,
                        gid: gid(line.gid).ok_or_else(missing)?,
                        groups: all.into_iter().filter_map(gid).collect(),
                    },
                })
            }
            User::Ids {
                uid: user,
                gid: group,
            } => {
                let missing = || refusal(ErrorCode::NoUser, "the largest number is no user");
                let line = passwd(&passwd_text).find(|line| line.uid == *user);
                let name = line
                    .as_ref()
                    .map(|line| OsStr::from_bytes(line.name).to_owned());
                Ok(Self {
                    name: name.unwrap_or_else(|| OsString::from(user.to_string())),
                    home: home(line.map(|line| line.home).unwrap_or_default()),
                    rights: Rights {
                        uid: uid(*user).ok_or_else(missing)?,
                        gid: gid(*group).ok_or_else(missing)?,
                        groups: Vec::new(),
                    },
                })
            }
        }
    }
}

fn home(field: &[u8]) -> OsString {
    match field {
        [b'/', ..] => OsString::from_vec(field.to_vec()),
        _ => OsString::from("/"),
    }
}

/// The owner that a file is to have.
pub(crate) fn owner(user: &User) -> Result<(Uid, Gid), Refusal> {
    let account = Account::find(user)?;
    Ok((account.rights.uid, account.rights.gid))
}

/// Gives an open file to its owner.
pub(crate) fn give(file: &fs::File, (uid, gid): (Uid, Gid)) -> Result<(), Refusal> {
    rustix::fs::fchown(file, Some(uid), Some(gid)).doing("giving the file to its owner")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_none_are_passed_over() {
        let text = b"root:x:0:0:root:/root:/bin/sh\n\nbad\n:::::\nx:x:-1:0::/:\nlast:x:4294967295:0::/:\nann:x:1000:100:A:/home/ann:";
        let names: Vec<_> = passwd(text).map(|line| line.name.to_vec()).collect();
        assert_eq!(names, [b"root".to_vec(), b"ann".to_vec()]);
    }

    #[test]
    fn groups_are_those_that_list_the_name() {
        let text = b"root:x:0:\naudio:x:29:ann,bob\nann:x:1000:\nbad\nvideo:x:44:joann\nwheel:x:10:bob,ann\n";
        assert_eq!(groups(text, b"ann"), [29, 10]);
    }
}
