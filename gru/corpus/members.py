"""The members of archives that are read: those that would be read as files of a directory.

This module does not know how members are found or read.
"""

from dataclasses import replace

from pathspec import GitIgnoreSpec

from gru.config_corpus import SourceOptions
from gru.corpus.archives import Member
from gru.corpus.file_formats import file_format
from gru.corpus.listing import SourceFile, hive_columns


class MemberChoice:
    """The rule that chooses from the members of a source's archives: its format, `include` and `exclude`.

    Patterns apply to the name of a member in the archive, and to that name behind the archive's.
    """

    def __init__(self, options: SourceOptions) -> None:
        self._options = options
        self._include, self._exclude = map(GitIgnoreSpec.from_lines, (options.include, options.exclude))

    def source_file(self, archive: SourceFile, member: Member) -> SourceFile | None:
        """Return the member as a file, to be read from the archive; None if it is passed over.

        Passed over are hidden members, archives in the archive, and those of an unknown or unwanted format.
        """
        name = f"{archive.name}/{member.name}"
        named = self._include.match_file(member.name)
        kind, compression = file_format(member.name, self._options.format, named)
        if kind is None or kind == "archive" or any(part.startswith(".") for part in member.name.split("/")):
            return None
        if self._options.include and not named and not self._include.match_file(name):
            return None
        if self._exclude.match_file(member.name) or self._exclude.match_file(name):
            return None
        return replace(
            archive,
            path=f"{archive.path}/{member.name}",
            name=name,
            size=member.size,
            kind=kind,
            compression=compression,
            seekable=False,
            columns=archive.columns + hive_columns(member.name),
        )
