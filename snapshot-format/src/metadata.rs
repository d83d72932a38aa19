//! The section `META`: whom the snapshot came from, its name and labels.

use std::collections::BTreeMap;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::Broken;
use crate::limits::MAX_LABELS;
use crate::{Payload, SectionKind, SnapshotId, text};

/// What is known about a snapshot besides its id and time, which stand in the header.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Program and version that wrote it.
    pub producer: String,
    /// The sandbox that it was taken of.
    pub source: Option<String>,
    /// The snapshot that the source was itself started from.
    pub parent: Option<SnapshotId>,
    /// The name that the user gave.
    pub name: Option<String>,
    /// The labels that the user put on it.
    #[serde(deserialize_with = "ascending")]
    pub labels: BTreeMap<String, String>,
}

impl Payload for Metadata {
    const KIND: SectionKind = SectionKind(*b"META");
    const VERSION: u16 = 1;
}

impl Metadata {
    pub(crate) fn check(&self) -> Result<(), Broken> {
        text::line("the producer", &self.producer)?;
        if let Some(source) = &self.source {
            text::label("the source", source)?;
        }
        if let Some(name) = &self.name {
            text::filled_line("the name", name)?;
        }
        Broken::if_more("labels", self.labels.len(), MAX_LABELS)?;
        for (key, value) in &self.labels {
            text::label("a label's key", key)?;
            text::value("a label's value", value)?;
        }
        Ok(())
    }
}

/// A map whose keys ascend: the one way to write it.
fn ascending<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, String>, D::Error> {
    struct Ascending;
    impl<'de> Visitor<'de> for Ascending {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a map with ascending keys")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut labels = BTreeMap::new();
            while let Some((key, value)) = map.next_entry::<String, String>()? {
                if labels
                    .last_key_value()
                    .is_some_and(|(last, _)| *last >= key)
                {
                    return Err(A::Error::custom("keys do not ascend"));
                }
                labels.insert(key, value);
            }
            Ok(labels)
        }
    }
    from.deserialize_map(Ascending)
}
